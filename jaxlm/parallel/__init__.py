"""Everything that knows devices exist: the mesh, the sharding rules, collectives. Never sees a model."""
