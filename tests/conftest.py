import os

# Tests leave the user's own cache alone and never profit from it; programs that they start inherit this.
os.environ["FEDCOMPUTE_CACHE_DIR"] = ""
