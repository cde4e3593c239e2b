//! The number of cases of property tests.
//!
//! Tests of parsers of external input have `fuzz` in their names: `Retry-After` and the other hints, `Accept`,
//! deadlines in headers, health queries, settings. By default each test runs a small number of cases. `PROPTEST_CASES`
//! sets the number for all of them:
//!
//! ```text
//! PROPTEST_CASES=100000 cargo test --all-features fuzz
//! ```

use proptest::test_runner::Config;

/// Returns a configuration with `usual` cases, or with the number in `PROPTEST_CASES`.
pub fn cases(usual: u32) -> Config {
    let said = std::env::var("PROPTEST_CASES").ok();
    let cases = said.and_then(|said| said.parse().ok()).unwrap_or(usual);
    Config { cases, failure_persistence: None, ..Config::default() }
}
