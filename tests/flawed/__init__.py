"""A small vhost-user back-end in plain Python that is right, and in which flaws can be planted: can they be found?"""
