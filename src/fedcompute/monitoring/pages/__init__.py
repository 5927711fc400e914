"""The dashboard: pages rendered on the server, their charts as data, and a little script that keeps both fresh."""
