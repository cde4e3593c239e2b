//! A call that waits needs an instance of its own.

use std::{convert::Infallible, future::Ready, task::{Context, Poll}};

struct Once;

impl tower::Service<http::Request<()>> for Once {
    type Response = http::Response<String>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Request<()>) -> Self::Future {
        std::future::ready(Ok(http::Response::new(String::new())))
    }
}

fn wants<S: tower::Service<http::Request<()>>>(_: S) {}

fn main() {
    wants(tower::Layer::layer(&buttress::CircuitBreakerLayer::http(), Once));
}
