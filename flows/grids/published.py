"""placeholder"""
PUBLISHED = ()
