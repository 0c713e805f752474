"""Object storage: `s3://bucket/key` and `oss://bucket/key` for data, start weights and checkpoints.

url          what such an address means; endpoint and credentials from the environment
store        requests to a bucket, with retries; errors in the user's words
cache        files of object storage on this machine, up to a bound
path         an object as a path: of data files, read through the cache
transfer     folders: up, down
"""
