"""How time and memory grow: the attentions measured, the processes that measure them, the fits."""
