//! Prints the values of a configuration with their sources, and the conflicts between settings.
//!
//! ```text
//! cargo run -p offline-examples --bin explain_config
//! cargo run -p offline-examples --bin explain_config -- client.toml
//! SEARCH_HTTP_CLIENT_RETRY_ATTEMPTS=9 cargo run -p offline-examples --bin explain_config
//! ```

use std::env;

use buttress::config::{ClientConfig, ConfigPreset, ServerConfig};

const FILE: &str = "
preset = 'internal'
connect_max_total = 50

[retry]
attempts = 2
backoff = '10ms'

[limit]
max = 128
";

/// A configuration for each conflict that `check` detects.
const CONFLICTS: [&str; 9] = [
    "deadline_default = '10s' \n timeout_head = '5s'",
    "retry_attempts = 6",
    "timeout_head = '2s'",
    "deadline_default = '91s' \n deadline_reserve = '2m'",
    "deadline_default = '91s' \n limit_queue_wait = '2m'",
    "connect_max_idle = '5s' \n connect_peer_keep_alive = '5s'",
    "retry_budget_ratio = 0.00001 \n retry_budget_per_second = 0",
    "streaming = true \n timeout_total = '5m'",
    "retry_atempts = 2",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let loader = ClientConfig::load("search");
    let loader = match env::args().nth(1) {
        Some(path) => loader.file(path),
        None => loader.toml(FILE),
    };
    let config = loader.env().finish()?;
    println!("{}", config.explain());
    match config.check() {
        Ok(()) => println!("no conflicts\n"),
        Err(errors) => println!("conflicts:\n{errors}\n"),
    }

    println!("{}", ServerConfig::preset(ConfigPreset::Internal).explain());

    println!("possible conflicts and their remedies:\n");
    for toml in CONFLICTS {
        let told = match ClientConfig::from_toml(toml) {
            Ok(config) => config.check().err().map(|errors| errors.to_string()),
            Err(errors) => Some(errors.to_string()),
        };
        println!("  {}\n    {}\n", toml.replace(" \n ", ", "), told.ok_or("not found")?);
    }
    Ok(())
}
