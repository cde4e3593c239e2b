//! The layers between real clients and servers of Rust, over sockets on loopback.

mod support;

mod e2e {
    mod attribution;
    mod axum;
    mod balance;
    mod connect;
    mod dashboard;
    mod drain;
    mod grpc;
    mod health;
    mod housekeeping;
    mod hyper;
    mod presets;
    mod reqwest;
    mod retry;
    mod serve;
    mod stack;
    mod time;
    mod tonic;
}
