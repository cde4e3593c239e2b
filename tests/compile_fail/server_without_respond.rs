//! The services of a server never fail, so a rejection cannot be an error there.

fn main() {
    let _: axum::Router = axum::Router::new()
        .route("/", axum::routing::get(|| async { "hello" }))
        .layer(buttress::ConcurrencyLimitLayer::new(2));
}
