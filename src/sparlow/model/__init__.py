"""World 2: modules. Opens models, walks their blocks, replaces their layers; never heard of an algorithm."""
