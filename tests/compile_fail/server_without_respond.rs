//! A server's services never fail; a refusal as an error does not fit in.

fn main() {
    let _: axum::Router = axum::Router::new()
        .route("/", axum::routing::get(|| async { "hello" }))
        .layer(buttress::ConcurrencyLimitLayer::new(2));
}
