//! Configurations: their sources, conflicts between settings, errors and explanations.

mod check;
mod load;
mod random;
mod stacks;
mod streams;
