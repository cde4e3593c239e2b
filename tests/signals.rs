//! Tests that change the state of a process, which tests in the same process would observe: the handlers of signals, and
//! whether the process serves `grpc.health.v1`.

mod support;

mod signals {
    mod grpc_health;
    #[cfg(unix)]
    mod lifecycle;
}
