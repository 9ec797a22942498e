"""What all other packages use: errors, components, records, settings, files and text."""
