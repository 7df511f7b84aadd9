"""What a validation shows on wandb, and what is to be seen on its pages."""

SAMPLES = [{"example": number, "target": text, "steps": [1, 3], "loss": [9.0, 0.5]} for number, text in enumerate(["a<", "\n)"])]
TREES = [
    {"layer": "<up>", "depth": 9, "trees": 1, "tokens": 40, "nodes": [[0, 0, 0, 0, 40, 2.5], [0, 1, 1, 10, 30, 0.5]]},
    {"layer": "down", "depth": 1, "trees": 2, "tokens": 40, "nodes": [[0, 0, 0, 0, 40, 0.0], [1, 0, 0, 0, 40, 0.0]]},
]
"Of a validation."


def check_pictures(computation: str, tree: str) -> None:
    first, second = ['title="1 steps, 9.0 bits" style="background:rgba(255,140,0,0.00)', 'title="3 steps, 0.5 bits"']
    assert computation.count(first) == computation.count(second) == 2 and ">&lt;<" in computation and "\u21b5\n<" in computation
    assert "&lt;up&gt;: levels 0 to 1 of 9, 40 tokens" in tree and "down, tree 2 of 2: levels 0 to 0 of 1" in tree
    assert "<title>root: 40 tokens, 100%, norm 2.5</title>" in tree and "<title>1: 30 tokens, 75%, norm 0.5</title>" in tree
    # Half an unit is left between boxes; the largest of a level is filled from the bottom to the top.
    assert '<rect x="250.0" width="749.4" y="22.0" height="20.0" fill="#36c"' in tree
    assert tree.count("<svg ") == tree.count("</svg>") == 3 and tree.count("<title>") == 4
