"""The paper's theorems as code: what holds, what fails as printed, and what is true instead. docs/theory.md explains.

- `arrays`        checked float64 matrices and the collapse measures of one of them; `TheoryError`
- `layers`        eq. (3) and eq. (6), and the mixing matrices of attention and selective SSMs
- `theorem41`     Theorem 4.1: condition (7), its threshold, b, the lambda it really needs
- `certificates`  lower bounds on relative mu from angles: Theorem 4.1*, a-posteriori, pre-norm at any depth
- `bounds`        upper bounds: Theorems 4.2, 4.3, A.3, A.6 to A.10 and their lemmas
- `constants`     gains and norms of real layers, from weights or from data
- `onestep`       what every lambda would do to one layer, from one forward pass
- `flow`          the critical lambda of a deep net, from its large-lambda limit
- `spectral`      rates near consensus and the lambda at which it stops attracting
- `examples`      the two systems of section 4.2.2 in closed form
- `statements_*`  every statement as an inequality; `instances` what they are tried on, `checking` how
- `verify`        all of it checked on random and adversarial instances
- `stretches`     on which |lambda| a measured net keeps a target, and a theorem promises that it does

Pure functions of numpy arrays; nothing here knows a model.
"""
