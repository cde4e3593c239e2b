//! The metrics of a deadline layer, which are those of the timeout layer inside of it.

use super::handle::DeadlineHandle;
use crate::{
    observe::{Observe, Part},
    sealed::Sealed,
};

impl Sealed for DeadlineHandle {}

/// All counts of a [`propagate_only`](super::layer::DeadlineLayer::propagate_only) layer are 0, because it ends no call.
impl Observe for DeadlineHandle {
    fn parts(&self) -> Vec<Part> {
        self.inner.parts()
    }
}
