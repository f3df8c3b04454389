"""What runs on each call: session, dispatch, requests, and what they report."""
