"""Matching objectives: functions of networks and images that know no container."""
