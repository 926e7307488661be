"""Associative recall over long sequences, learned with one method of attention after the other."""
