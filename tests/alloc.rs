//! The allocations of calls through the layers. The allocator of this binary counts them per thread.

mod support;

mod alloc {
    mod hedge;
    mod layers;
    mod retry;
}
