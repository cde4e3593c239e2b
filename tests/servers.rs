//! The layers with servers and clients that are not part of a Rust build: nginx, Varnish, Node.js, curl, grpcio,
//! httpx, Prometheus, Chromium.
//!
//! A test whose program is not installed prints a line and passes. With `BUTTRESS_REQUIRE_REAL` set it fails.

mod support;

mod servers {
    mod dashboard;
    mod default_stacks;
    mod drain;
    mod nginx;
    mod observe;
    mod uploads;
}
