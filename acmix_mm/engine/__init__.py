"""What the tools do: functions around MMEngine's config and runner."""
