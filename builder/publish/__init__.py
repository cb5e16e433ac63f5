"""The verdict on a build, the link that people serve by, and the build record."""
