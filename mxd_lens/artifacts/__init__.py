"""What a job writes: tables and pages."""
