"""Files, inodes and operations: what stands between a descriptor and the object behind it."""
