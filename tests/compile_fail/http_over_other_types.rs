//! The layer is for HTTP by default, and the service has other types.

fn wants<S: tower::Service<u32>>(_: S) {}

fn main() {
    let service = tower::service_fn(|n: u32| async move { Ok::<_, std::io::Error>(n) });
    wants(tower::Layer::layer(&buttress::CircuitBreakerLayer::http(), service));
}
