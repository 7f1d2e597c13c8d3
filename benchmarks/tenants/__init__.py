"""One basis for many customers: chosen on some, judged on others."""
