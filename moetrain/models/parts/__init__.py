"""What a model is made of. A part owns its sizes, its weights, what divides it over ranks, what an
adapter can stand beside, and its arithmetic. No torch; `engine/layers/` has a page for each.
"""
