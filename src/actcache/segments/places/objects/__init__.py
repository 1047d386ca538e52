"""A store in an object store: S3, and whatever else fsspec knows. Needs the extra ``s3``; imported when a URL asks."""

from actcache.segments.places.objects.object_place import ObjectPlace

__all__ = ["ObjectPlace"]
