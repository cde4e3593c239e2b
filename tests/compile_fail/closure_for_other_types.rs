//! The closure classifies another error type than that of the service.

fn wants<S: tower::Service<u32>>(_: S) {}

fn judge(result: Result<&u32, &std::fmt::Error>) -> buttress::Outcome {
    result.map_or(buttress::Outcome::failure(), |_| buttress::Outcome::success())
}

fn main() {
    let service = tower::service_fn(|n: u32| async move { Ok::<_, std::io::Error>(n) });
    let layer = buttress::CircuitBreakerLayer::http().classify(judge);
    wants(tower::Layer::layer(&layer, service));
}
