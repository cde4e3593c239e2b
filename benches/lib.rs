//! Empty. The benches are in `overhead`, `goodput` and `keys`.
