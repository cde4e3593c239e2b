//! How long property tests try.
//!
//! Those of everything that reads what others wrote have `fuzz` in their names: `Retry-After` and its kin, `Accept`,
//! gRPC's and other deadlines, health queries, settings. Each tries its usual number of cases, which takes a
//! moment; `PROPTEST_CASES` says another one, for all of them:
//!
//! ```text
//! PROPTEST_CASES=100000 cargo test --all-features fuzz
//! ```

use proptest::test_runner::Config;

/// So many cases, unless the environment says otherwise.
pub fn cases(usual: u32) -> Config {
    let said = std::env::var("PROPTEST_CASES").ok();
    let cases = said.and_then(|said| said.parse().ok()).unwrap_or(usual);
    Config { cases, failure_persistence: None, ..Config::default() }
}
