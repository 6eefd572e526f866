"""What every room uses: errors, files, paths, processes, what is shown, and the one import of unsloth."""
