"""The crossing: knows both the dense model and its sparse student."""
