"""The plugin is for pytest processes of its own: importing it puts the CPU platform in place."""

collect_ignore = ["megatron_suite_plugin.py"]
