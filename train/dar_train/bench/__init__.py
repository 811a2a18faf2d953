"""What a training step takes: images a second, memory, utilisation, beside a plain eager loop."""
