use buttress::config::{ClientConfig, ServerConfig};

/// A remedy names a key that this configuration has.
#[test]
fn renamed_key_of_the_client_in_a_server_configuration() {
    for old in ["retry_drain_up_to", "hedge_replay_up_to", "breaker_probe_lease"] {
        let error = ServerConfig::from_toml(&format!("{old} = 1")).unwrap_err().to_string();
        let named = error.split('`').nth(3);
        if let Some(named) = named {
            assert!(
                ServerConfig::default().source(named).is_some(),
                "the remedy names a key that does not exist: {error}"
            );
        }
    }
}

/// Every error of a client's setting names a key that exists.
#[test]
fn errors_of_invalid_values_name_keys() {
    for text in [
        "limit_max = 0",
        "limit_max = 5\nlimit_queue = 5\nlimit_queue_wait = 0",
        "connect_queue = 5\nconnect_queue_wait = 0",
        "connect_jitter = 5",
        "connect_max_total = 0",
        "connect_max_per_host = 0",
        "connect_timeout = 0",
        "connect_max_age = 0",
        "connect_max_idle = 0",
        "limit_max = 5\nlimit_max_unread = 0",
        "retry_attempts = 0",
        "retry_hint_jitter = 50",
        "retry_attempt_timeout = 0",
        "retry_backoff_factor = 0.1",
        "retry_backoff_max = 0",
        "retry_unprocessed = [200]",
        "hedge_after = \"1s\"\nhedge_max_hedges = 0",
        "hedge_after = \"1s\"\nhedge_max_hedges = 50",
        "hedge_after = 0",
        "breaker_half_open = 0",
        "breaker_half_open = 5000",
        "breaker_open_for = 0",
        "breaker_open_for_max = 0",
        "breaker_probe_timeout = 0",
        "breaker_count_cancelled_after = 0",
        "deadline_default = 0",
        "deadline_max = 0",
        "timeout_head = 0",
        "timeout_response_idle = 0",
        "timeout_request_idle = 0",
        "timeout_request_stall = 0",
        "timeout_total = 0",
        "timeout_min_body_rate = 0",
    ] {
        let Ok(config) = ClientConfig::from_toml(text) else { continue };
        let Err(errors) = config.check() else { continue };
        for error in errors.iter() {
            let exists = ClientConfig::default().source(error.field).is_some();
            assert!(exists, "{text:?}: {error}");
        }
    }
}
