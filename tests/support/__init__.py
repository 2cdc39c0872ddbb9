"""What tests share: ranks as processes or threads, and what is right told by other means."""
