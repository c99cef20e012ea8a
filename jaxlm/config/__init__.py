"""What a run is: dataclasses, the mesh grammar, YAML recipes with overrides, cross-field checks. Never imports jax."""
