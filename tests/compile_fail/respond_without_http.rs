//! `respond` needs HTTP responses, and the service has others.

fn wants<S: tower::Service<u32>>(_: S) {}

fn main() {
    let service = tower::service_fn(|n: u32| async move { Ok::<_, std::io::Error>(n) });
    let layer = buttress::ConcurrencyLimitLayer::new(2).per_response().respond();
    wants(tower::Layer::layer(&layer, service));
}
