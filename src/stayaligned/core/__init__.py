"""What everything else stands on: errors, components, records, settings, files and text."""
