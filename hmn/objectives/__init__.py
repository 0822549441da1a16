"""Matching objectives: functions of networks and images, independent of containers."""
