"""Client plans: what they may do, and how they are computed here."""
