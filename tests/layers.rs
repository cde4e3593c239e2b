//! The layers over scripted services, on a paused clock.

mod support;

mod layers {
    mod attribution;
    mod breaker;
    mod classification;
    mod config;
    mod connect;
    mod events;
    mod health;
    mod hedge;
    mod limit;
    mod live_changes;
    mod observe;
    mod retry;
    mod secrets;
    mod simulation;
    mod spawned_tasks;
    mod stacks;
    mod time;
    mod upstream_bugs;
}
