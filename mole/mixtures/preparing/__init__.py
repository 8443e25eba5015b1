"""What routers are given before they route: prototypes and statistics from data, gates, weights found by search."""
