//! Configurations from TOML, JSON and the environment: unknown settings, and the source of each value.

use std::time::Duration;

use buttress::config::{
    BreakerConfig, ClientConfig, ConfigPreset, HedgeConfig, Loader, ServerConfig, Source,
    TimeoutConfig,
};

use crate::support::secs;

fn search() -> Loader<ClientConfig> {
    ClientConfig::load("search")
}

#[test]
fn toml_json_and_environment_load_the_same_settings() {
    let toml = "
        preset = 'internal'
        connect_max_total = 50
        [timeout]
        head = 2.5
        response_idle = 'off'
        [retry]
        attempts = 2
        budget.ratio = 0.1
    ";
    let json = r#"{"preset": "internal", "connect_max_total": 50, "timeout_response_idle": null,
        "timeout": {"head": "2s 500ms"}, "retry": {"attempts": 2, "budget_ratio": 0.1}}"#;
    let env = [
        ("HTTP_CLIENT_PRESET", "internal"),
        ("HTTP_CLIENT_CONNECT_MAX_TOTAL", "50"),
        ("HTTP_CLIENT_TIMEOUT_HEAD", "2500ms"),
        ("HTTP_CLIENT_TIMEOUT_RESPONSE_IDLE", "off"),
        ("HTTP_CLIENT_RETRY_ATTEMPTS", "2"),
        ("HTTP_CLIENT_RETRY_BUDGET_RATIO", "0.1"),
        ("HOME", "/"),
    ];
    let all = [search().toml(toml), search().json(json), search().env_from(env)];
    let all = all.map(|loader| loader.finish().unwrap());
    for config in &all {
        assert_eq!(config.connect.max_total, Some(50));
        assert_eq!(config.timeout.head, Some(Duration::from_millis(2500)));
        assert_eq!((config.timeout.response_idle, config.retry.attempts), (None, 2));
        assert_eq!(config.retry.budget_ratio, 0.1);
        assert_eq!(config.deadline.default, Some(secs(10)), "the value of the preset");
        assert!(config.changes(&all[0]).is_empty());
        config.check().unwrap();
    }
    // Written with serde and read again.
    let written = serde_json::to_string(&all[0]).unwrap();
    let read: ClientConfig = serde_json::from_str(&written).unwrap();
    assert!(read.changes(&all[0]).is_empty(), "{written}");
    let changed = ClientConfig::default().changes(&all[0]);
    let live = |key| changed.iter().find(|change| change.key == key).unwrap().live;
    assert!(live("timeout_head") && live("connect_max_total") && !live("retry_budget_ratio"));
}

#[test]
fn variables_of_one_service_precede_common_ones_and_both_precede_files() {
    let env = [
        ("SEARCH_HTTP_CLIENT_CONNECT_MAX_TOTAL", "7"),
        ("HTTP_CLIENT_CONNECT_MAX_TOTAL", "50"),
        ("HTTP_CLIENT_CONNECT_TIMEOUT", "1s"),
        ("BILLING_HTTP_CLIENT_CONNECT_TIMEOUT", "9s"),
        ("HTTP_SERVER_LIMIT_MAX", "nonsense"),
    ];
    let file = "connect_max_total = 99\nconnect_timeout = '8s'\ntimeout_head = '20s'";
    let config = search().toml(file).env_from(env).finish().unwrap();
    assert_eq!(config.connect.max_total, Some(7));
    assert_eq!(config.connect.timeout, secs(1));
    let origin = |key| config.source(key).unwrap().to_string();
    assert_eq!(origin("connect_max_total"), "env SEARCH_HTTP_CLIENT_CONNECT_MAX_TOTAL");
    assert_eq!(origin("connect_timeout"), "env HTTP_CLIENT_CONNECT_TIMEOUT");
    assert_eq!(origin("timeout_head"), "file TOML");
    assert_eq!(config.source("timeout_response_idle"), Some(Source::Default));
    assert_eq!(config.source("no_such_key"), None);
    let other = ClientConfig::load("billing").env_from(env).finish().unwrap();
    assert_eq!(other.connect.max_total, Some(50));
    assert_eq!(other.connect.timeout, secs(9));
    // A name of several words, and an empty name.
    let named = ClientConfig::load("user-db").env_from([("USER_DB_HTTP_CLIENT_STREAMING", "true")]);
    assert!(named.finish().unwrap().calls.streaming);
    let none = ClientConfig::load("").env_from([("_HTTP_CLIENT_STREAMING", "x")]);
    assert!(!none.finish().unwrap().calls.streaming);
}

#[test]
fn unknown_key_is_an_error_with_a_suggestion_for_a_near_miss() {
    for (key, nearest) in [
        ("retry_atempts", "retry_attempts"),
        ("conect_max_total", "connect_max_total"),
        ("timeout_hed", "timeout_head"),
        ("presett", "preset"),
    ] {
        let error = search().json(&format!(r#"{{"{key}": 1}}"#)).finish().unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("unknown setting `{key}`: use `{nearest}` (file JSON)")
        );
    }
    for key in ["", "retry", "user_agent", "attempts", "retry_attempt_count", "x", "proxy"] {
        let error = search().json(&format!(r#"{{"{key}": 1}}"#)).finish().unwrap_err();
        assert_eq!(error.to_string(), format!("unknown setting `{key}`: leave it out (file JSON)"));
    }
    let error = search().env_from([("HTTP_CLIENT_USER_AGENT", "x")]).finish().unwrap_err();
    assert_eq!(
        error.to_string(),
        "unknown setting `user_agent`: leave it out (env HTTP_CLIENT_USER_AGENT)"
    );
    assert!(error.iter().all(|error| error.value == "user_agent"));
    let error = search().env_from([("SEARCH_HTTP_CLIENT_RETRYS", "1")]).finish().unwrap_err();
    assert!(error.to_string().contains("(env SEARCH_HTTP_CLIENT_RETRYS)"), "{error}");
    assert!(ServerConfig::from_toml("retry_attempts = 2").is_err(), "a server has none");
}

#[test]
fn all_errors_are_reported_at_once() {
    let error = search()
        .toml("retry_attempts = -1\ntimeout_head = 'soon'\nstreaming = 3\npreset = 'fast'")
        .env_from([("HTTP_CLIENT_LIMIT_MAX", "many")])
        .finish()
        .unwrap_err();
    let told: Vec<_> = error.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "`preset` is fast: use one of internal, slow, llm (file TOML)",
            "`retry_attempts` is -1: use a whole number, 0 or more (file TOML)",
            "`streaming` is 3: use true or false (file TOML)",
            "`timeout_head` is soon: use a time such as 250ms, 1m 30s or, in seconds, 2.5 (file TOML)",
            "`limit_max` is many: use a whole number, 0 or more (env HTTP_CLIENT_LIMIT_MAX)",
        ]
    );
    let error = search().toml("retry_attempts = 2\n\nlimit_max == 3").finish().unwrap_err();
    assert!(error.to_string().ends_with(" at line 3"), "{error}");
    for broken in ["[", "retry = 3", "retry_attempts = [1]", "a.b.c = 1"] {
        assert!(search().toml(broken).finish().is_err(), "{broken}");
    }
    assert!(search().file("/no/such/file.toml").finish().is_err());
    assert!(search().json("[1, 2]").finish().is_err());
    assert!(search().json("7").finish().is_err());
}

#[test]
fn empty_and_repeated_settings_are_errors() {
    let told = |loader: Loader<ClientConfig>| loader.finish().unwrap_err().to_string();
    for (name, wants) in [
        ("RETRY_ATTEMPTS", "a whole number, 0 or more"),
        ("TIMEOUT_HEAD", "a time such as 250ms, 1m 30s or, in seconds, 2.5"),
        ("CHECK_HEALTH_URI", "a text"),
        ("PRESET", "one of internal, slow, llm"),
    ] {
        let (name, key) = (format!("HTTP_CLIENT_{name}"), name.to_lowercase());
        assert_eq!(
            told(search().env_from([(name.clone(), "")])),
            format!("`{key}` is empty: use {wants}, or leave it out (env {name})")
        );
    }
    for (twice, key) in [
        ("retry_attempts = 2\n[retry]\nattempts = 3", "retry_attempts"),
        ("[retry]\nbudget_cap = 2\nbudget.cap = 2", "retry_budget_cap"),
    ] {
        let error = told(search().toml(twice));
        assert_eq!(error, format!("`key` is {key}: set twice; set it only once (file TOML)"));
    }
    assert!(search().json(r#"{"limit_max": 1, "limit_max": 2}"#).finish().is_err());
    // Of two files, the later one takes precedence.
    let two = search().toml("limit_max = 1").toml("limit.max = 2").finish().unwrap();
    assert_eq!(two.limit.max, Some(2));
}

#[cfg(unix)]
#[test]
fn variable_that_is_not_utf_8_is_an_error_only_with_the_prefix() {
    use std::{ffi::OsString, os::unix::ffi::OsStringExt};

    let odd = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let told = |name: &[u8], value: &[u8]| {
        let config = search().env_from([(odd(name), odd(value))]).finish();
        config.map_err(|errors| errors.to_string())
    };
    assert_eq!(
        told(b"HTTP_CLIENT_LIMIT_MAX", b"1\xff").unwrap_err(),
        "`environment` is HTTP_CLIENT_LIMIT_MAX: use UTF-8"
    );
    let error = told(b"SEARCH_HTTP_CLIENT_LIMIT_M\xff", b"1").unwrap_err();
    assert!(error.contains("use `limit_max`"), "{error}");
    for others in [&b"\xff"[..], b"\xffHTTP_CLIENT_LIMIT_MAX", b"OTHER_HTTP_CLIENT_LIMIT_MAX"] {
        assert_eq!(told(others, b"\xff").unwrap().limit.max, Some(256));
    }
}

#[test]
fn toml_and_json_files_are_loaded() {
    let folder = std::env::temp_dir().join(format!("buttress-config-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (toml, json) = (folder.join("client.toml"), folder.join("client.json"));
    std::fs::write(&toml, "retry.attempts = 2").unwrap();
    std::fs::write(&json, r#"{"retry": {"backoff": "10ms"}}"#).unwrap();
    let config = search().file(&toml).file(&json).finish();
    std::fs::remove_dir_all(&folder).unwrap();
    let config = config.unwrap();
    assert_eq!((config.retry.attempts, config.retry.backoff), (2, Duration::from_millis(10)));
    let origin = config.source("retry_attempts").unwrap().to_string();
    assert!(origin.ends_with("client.toml"), "{origin}");
}

#[test]
fn settings_of_a_single_layer_can_be_read_alone() {
    let timeout: TimeoutConfig = toml::from_str("head = '2s'\ntotal = 9").unwrap();
    assert_eq!(
        (timeout.head, timeout.total, timeout.response_idle),
        (Some(secs(2)), Some(secs(9)), Some(secs(60)))
    );
    let breaker: BreakerConfig = serde_json::from_str(r#"{"breaker_failures": 9}"#).unwrap();
    assert_eq!(breaker.failures, Some(9));
    let error = toml::from_str::<TimeoutConfig>("haed = 1").unwrap_err();
    assert!(error.message().contains("unknown setting `haed`: use `head`"), "{error}");
    let error = toml::from_str::<TimeoutConfig>("head = true").unwrap_err();
    assert!(error.message().contains("use a time such as"), "{error}");
    let hedge: HedgeConfig = toml::from_str("after = '80ms'\nbudget.ratio = 0.1").unwrap();
    assert_eq!((hedge.after, hedge.budget_ratio), (Some(Duration::from_millis(80)), 0.1));
    assert!(hedge.layer().is_ok() && HedgeConfig::default().layer().is_ok());
    for (toml, field) in [("after = 0", "delay"), ("percentile = 1", "after_percentile")] {
        let hedge: HedgeConfig = toml::from_str(toml).unwrap();
        assert_eq!(hedge.layer().unwrap_err().field, field);
    }
    {
        use buttress::config::HealthProbeConfig;
        type Nothing = http_body_util::Empty<bytes::Bytes>;

        let probe: HealthProbeConfig = toml::from_str("uri = '/up'\nfall = 2").unwrap();
        assert_eq!((probe.uri.as_deref(), probe.fall, probe.every), (Some("/up"), 2, secs(5)));
        assert!(probe.layer::<Nothing>().is_ok());
        for (toml, field) in
            [("fall = 0", "thresholds"), ("every = 0", "every"), ("jitter = 2", "jitter")]
        {
            let probe: HealthProbeConfig = toml::from_str(toml).unwrap();
            assert!(probe.layer::<Nothing>().unwrap_err().field.starts_with(field), "{toml}");
        }
        assert!(toml::from_str::<HealthProbeConfig>("fal = 1").is_err());
    }
    let written = toml_of(&timeout);
    assert_eq!(serde_json::from_str::<TimeoutConfig>(&written).unwrap(), timeout);
}

fn toml_of(config: &TimeoutConfig) -> String {
    serde_json::to_string(config).unwrap()
}

#[test]
fn presets_are_valid_and_differ() {
    for preset in [ConfigPreset::Internal, ConfigPreset::Slow, ConfigPreset::Llm] {
        ClientConfig::preset(preset).check().unwrap();
        ServerConfig::preset(preset).check().unwrap();
    }
    ClientConfig::default().check().unwrap();
    ServerConfig::default().check().unwrap();
    let llm = search().preset(ConfigPreset::Llm).finish().unwrap();
    assert!(llm.timeout.first_frame > Some(secs(100)), "a long first frame");
    assert!(llm.timeout.response_idle.is_some(), "silence is bounded");
    assert_eq!((llm.timeout.total, llm.deadline.default), (None, None), "no total timeout");
    assert!(llm.connect.max_per_host < Some(10), "few connections");
    // A loaded preset takes precedence over the preset of the program.
    let loaded = search().toml("preset = 'slow'").preset(ConfigPreset::Llm).finish().unwrap();
    assert_eq!(loaded.timeout.head, Some(secs(60)));
}

#[test]
fn streaming_turns_off_limits_for_slow_clients_of_a_server_unless_they_are_set() {
    let bounds =
        |config: &ServerConfig| (config.timeout.min_body_rate, config.limit.max_unread.is_some());
    let load = |toml: &str| ServerConfig::from_toml(toml).unwrap();
    assert_eq!(bounds(&ServerConfig::default()), (Some(240), true));
    assert_eq!(bounds(&load("streaming = false")), (Some(240), true));
    let streaming = load("streaming = true");
    assert_eq!(bounds(&streaming), (None, false));
    assert_eq!(bounds(&ServerConfig::preset(ConfigPreset::Llm)), (None, false));
    let set = load("timeout_min_body_rate = 100\nstreaming = true\nlimit_max_unread = '9s'");
    assert_eq!(bounds(&set), (Some(100), true));
    let overridden = load("preset = 'llm'\nstreaming = false");
    assert_eq!(bounds(&overridden), (Some(240), true));

    let explained = streaming.explain();
    let line = explained.lines().find(|line| line.contains("limit_max_unread")).unwrap();
    assert!(line.contains("off          default if streaming"), "{line}");
    // A client has neither of these defaults.
    let client = ClientConfig::from_toml("streaming = true").unwrap();
    assert_eq!((client.timeout.min_body_rate, client.limit.max_unread), (None, None));
    assert!(!client.limit.exempt_grpc_health && streaming.limit.exempt_grpc_health);
}

#[test]
fn explain_lists_the_stack_outermost_first_with_the_source_of_each_value() {
    let mut config = search()
        .preset(ConfigPreset::Llm)
        .toml("[retry]\nattempts = 2")
        .env_from([("SEARCH_HTTP_CLIENT_LIMIT_MAX", "off")])
        .finish()
        .unwrap();
    config.timeout.response_idle = Some(secs(45));
    config.breaker.open_for = secs(7);
    let told = config.explain();
    assert!(
        told.starts_with("client `search`, preset llm, outermost first; settings marked * "),
        "{told}"
    );
    let at = |what: &str| told.find(what).unwrap_or_else(|| panic!("no {what} in\n{told}"));
    let order = [
        "\nDeadlineLayer",
        "\nRetryLayer",
        "\nHedgeLayer (off)",
        "\nCircuitBreakerLayer",
        "\nConcurrencyLimitLayer (off)",
        "\nTimeoutLayer",
        "\nHealthProbeLayer (off)",
        "\nConnectLayer",
        "\ncheck_health",
        "\ncalls",
    ];
    assert!(order.map(at).is_sorted(), "{told}");
    let line = |key: &str| {
        let bare = |line: &&str| line.trim_start_matches(['*', ' ']).starts_with(key);
        let line = told.lines().find(bare).unwrap().trim_start_matches('*');
        line.split_whitespace().take(4).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("retry_attempts "), "retry_attempts 2 file TOML");
    assert_eq!(line("timeout_head "), "timeout_head 3m preset llm");
    assert_eq!(line("timeout_response_idle "), "timeout_response_idle 45s code The");
    assert_eq!(line("breaker_open_for "), "breaker_open_for 7s code The");
    assert_eq!(line("limit_max "), "limit_max off env SEARCH_HTTP_CLIENT_LIMIT_MAX");
    assert_eq!(line("limit_queue "), "limit_queue 1024 default The");
    // The mark is for a setting that no handle can change.
    let marked: Vec<_> = told.lines().filter_map(|line| line.strip_prefix("* ")).collect();
    for (key, fixed) in
        [("deadline_header ", true), ("connect_http2_only ", true), ("limit_max ", false)]
    {
        assert_eq!(marked.iter().any(|line| line.starts_with(key)), fixed, "{key}");
    }
    // The descriptions are aligned, whatever the length of a variable's name.
    let column = |what: &str| told.lines().find_map(|line| line.find(what)).unwrap();
    assert_eq!(
        column("The maximum number of calls in"),
        column("The maximum number of calls that wait")
    );
    let server = ServerConfig::default().explain();
    assert!(server.starts_with("server, outermost first; ") && !server.contains("retry_"));
}

// ===== Variables of the platform =====

/// Returns the variables that kubelet injects for a service with these ports (name, number, protocol).
fn service_links(service: &str, ports: &[(&str, u16, &str)]) -> Vec<(String, String)> {
    let upper = |name: &str| name.to_uppercase().replace('-', "_");
    let name = upper(service);
    let (_, first, protocol) = ports[0];
    let address = "10.96.0.7";
    let url = |number, protocol: &str| format!("{}://{address}:{number}", protocol.to_lowercase());
    let mut variables = vec![
        (format!("{name}_SERVICE_HOST"), address.to_owned()),
        (format!("{name}_SERVICE_PORT"), first.to_string()),
        (format!("{name}_PORT"), url(first, protocol)),
    ];
    for (port, number, protocol) in ports {
        if !port.is_empty() {
            variables.push((format!("{name}_SERVICE_PORT_{}", upper(port)), number.to_string()));
        }
        let prefix = format!("{name}_PORT_{number}_{protocol}");
        variables.push((prefix.clone(), url(*number, protocol)));
        variables.push((format!("{prefix}_PROTO"), protocol.to_lowercase()));
        variables.push((format!("{prefix}_PORT"), number.to_string()));
        variables.push((format!("{prefix}_ADDR"), address.to_owned()));
    }
    variables
}

#[test]
fn service_links_of_kubernetes_and_docker_are_ignored() {
    let ports = [
        &[("", 80, "TCP")][..],
        &[("http", 80, "TCP"), ("grpc-web", 8443, "TCP"), ("quic", 443, "UDP"), ("sig", 9, "SCTP")],
    ];
    let services = [
        "http-server",
        "http-client",
        "search-http-client",
        "search-http-server",
        // Names that continue after the prefix of the settings.
        "http-server-api",
        "http-client-breaker-failures",
    ];
    for (service, ports) in
        services.into_iter().flat_map(|service| ports.map(|ports| (service, ports)))
    {
        let links = service_links(service, ports);
        for (name, value) in &links {
            let one = [(name.as_str(), value.as_str())];
            search().env_from(one).finish().unwrap_or_else(|error| panic!("{name}: {error}"));
            let server = ServerConfig::load("search").env_from(one).finish();
            server.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let mut all: Vec<(String, String)> = links;
        all.push(("HTTP_CLIENT_BREAKER_FAILURES".into(), "9".into()));
        let config = search().env_from(all).finish().unwrap();
        assert_eq!(config.breaker.failures, Some(9), "a key of its own is read");
    }
    let docker = [("HTTP_SERVER_NAME", "/web/http-server"), ("HTTP_SERVER_ENV_PATH", "/usr/bin")];
    ServerConfig::load("").env_from(docker).finish().unwrap();
}

#[test]
fn misspelt_keys_are_errors_although_service_links_are_ignored() {
    for (name, value) in [
        ("HTTP_CLIENT_BREAKER_FALURES", "5"),
        ("SEARCH_HTTP_CLIENT_BREAKER_FALURES", "5"),
        ("HTTP_CLIENT_SERVICE", "search"),
        ("HTTP_CLIENT_HOST", "search"),
        ("HTTP_CLIENT_NAME", "search"),
        // Kubernetes injects an address.
        ("HTTP_CLIENT_PORT", "8080"),
        ("HTTP_CLIENT_PORT_HTTP_TCP", "tcp://10.0.0.1:80"),
        ("HTTP_CLIENT_PORT_80_TCP_HOST", "10.0.0.1"),
        ("HTTP_CLIENT_RETRY_ENV_X", "1"),
    ] {
        let error = search().env_from([(name, value)]).finish().unwrap_err().to_string();
        assert!(error.starts_with("unknown setting `"), "{error}");
        assert!(error.ends_with(&format!(" (env {name})")), "{error}");
    }
}

#[test]
fn explain_states_the_maximum_of_a_header() {
    for (toml, note) in [
        ("deadline_default = '10s'", "at most 10s (`deadline_default`)"),
        ("deadline_default = '10s'\ndeadline_max = '30s'", "at most 30s (`deadline_max`)"),
        ("", "has no maximum: set `deadline_default` or `deadline_max`"),
    ] {
        let explained = ServerConfig::from_toml(toml).unwrap().explain();
        let notes: Vec<_> = explained.lines().filter(|line| line.contains("note: ")).collect();
        assert_eq!(notes.len(), 1, "{explained}");
        assert!(notes[0].ends_with(note), "{notes:?}");
    }
}

#[test]
fn list_setting_is_read_from_files_and_from_text() {
    let statuses = |config: ClientConfig| {
        config.retry.unprocessed.iter().map(|status| status.as_u16()).collect::<Vec<_>>()
    };
    for file in ["retry_unprocessed = [429, 529]", "retry_unprocessed = '429, 529'"] {
        assert_eq!(statuses(search().toml(file).finish().unwrap()), [429, 529], "{file}");
    }
    let env = [("HTTP_CLIENT_RETRY_UNPROCESSED", "429,529")];
    assert_eq!(statuses(search().env_from(env).finish().unwrap()), [429, 529]);
    let llm = search().toml("preset = 'llm'");
    assert_eq!(statuses(llm.finish().unwrap()), [429, 529]);
    for off in ["retry_unprocessed = 'off'", "retry_unprocessed = []"] {
        let none = search().toml(&format!("preset = 'llm'\n{off}"));
        assert_eq!(statuses(none.finish().unwrap()), [0; 0], "{off}");
    }
    let error = search().toml("retry_unprocessed = [429, 'many']").finish().unwrap_err();
    assert!(error.to_string().contains("use HTTP statuses such as 429, 529, or off"), "{error}");
    let error = search().toml("retry_unprocessed = [200]").finish().unwrap().check();
    assert!(format!("{error:?}").contains("use statuses of 400 or more"), "{error:?}");
}

// ===== The prefix of variables =====

#[test]
fn env_prefix_replaces_the_default_one() {
    let env = [
        ("ACME_RETRY_ATTEMPTS", "2"),
        ("SEARCH_ACME_LIMIT_MAX", "7"),
        ("ACME_LIMIT_MAX", "9"),
        ("HTTP_CLIENT_RETRY_ATTEMPTS", "5"),
        // Kubernetes injects these for a service called `acme`.
        ("ACME_SERVICE_HOST", "10.0.0.1"),
        ("ACME_PORT", "tcp://10.0.0.1:80"),
    ];
    let config = search().env_prefix("ACME_").env_from(env).finish().unwrap();
    assert_eq!((config.retry.attempts, config.limit.max), (2, Some(7)));
    assert_eq!(config.source("limit_max").unwrap().to_string(), "env SEARCH_ACME_LIMIT_MAX");
    let error = search().env_prefix("ACME_").env_from([("ACME_USER_AGENT", "x")]).finish();
    let error = error.unwrap_err().to_string();
    assert_eq!(error, "unknown setting `user_agent`: leave it out (env ACME_USER_AGENT)");
    let server = ServerConfig::load("").env_prefix("WEB_").env_from([("WEB_LIMIT_MAX", "3")]);
    assert_eq!(server.finish().unwrap().limit.max, Some(3));
    // Variables of the platform without one of this prefix.
    search().env_prefix("NO_SUCH_PREFIX_").env().finish().unwrap();
}

#[test]
fn env_prefix_without_effect_is_an_error() {
    for prefix in ["", "_", "ACME", "ACME-", "ACME _", "ÄCME_"] {
        let errors = search().env_prefix(prefix).env_from([("HOME", "/")]).finish().unwrap_err();
        let fields: Vec<_> = errors.iter().map(|error| error.field).collect();
        assert_eq!(fields, ["env_prefix"], "{prefix}");
    }
    let late = search().env_from([("HOME", "/")]).env_prefix("ACME_").finish().unwrap_err();
    assert_eq!(late.to_string(), "`env_prefix` is ACME_: set it before `env` reads the variables");
}

// ===== Names of other clients =====

#[test]
fn variables_of_other_clients_set_the_settings_that_replace_them() {
    let names = [
        ("MAX_CONNECTIONS", "50"),
        ("DEFAULT_TIMEOUT", "30"),
        ("CONNECT_TIMEOUT", "2"),
        ("READ_TIMEOUT", "20"),
        ("WRITE_TIMEOUT", "15.5"),
        ("MAX_RETRIES", "3"),
        ("RETRY_BACKOFF_MULTIPLIER", "1.5"),
    ];
    for prefix in ["HTTP_CLIENT_", "SEARCH_HTTP_CLIENT_"] {
        let env = names.map(|(name, value)| (format!("{prefix}{name}"), value));
        let config = search().env_from(env).finish().unwrap();
        assert_eq!(config.connect.max_total, Some(50));
        assert_eq!((config.timeout.total, config.connect.timeout), (Some(secs(30)), secs(2)));
        let reads = [config.timeout.head, config.timeout.first_frame, config.timeout.response_idle];
        assert_eq!(reads, [Some(secs(20)); 3]);
        assert_eq!(config.timeout.request_stall, Some(Duration::from_millis(15_500)));
        assert_eq!((config.retry.attempts, config.retry.backoff_factor), (4, 1.5));
        let origin = config.source("timeout_response_idle").unwrap().to_string();
        assert_eq!(origin, format!("env {prefix}READ_TIMEOUT"));
        config.check().unwrap();
        drop(buttress::stack::ClientStack::new(&config).unwrap());
    }
    let none = search().env_from([("HTTP_CLIENT_MAX_RETRIES", "0")]).finish().unwrap();
    assert_eq!(none.retry.attempts, 1);
}

#[test]
fn variable_with_the_name_of_a_setting_precedes_that_of_another_client() {
    let both = [("HTTP_CLIENT_TIMEOUT_HEAD", "7s"), ("HTTP_CLIENT_READ_TIMEOUT", "20s")];
    for env in [both, [both[1], both[0]]] {
        let config = search().env_from(env).finish().unwrap();
        assert_eq!(
            (config.timeout.head, config.timeout.response_idle),
            (Some(secs(7)), Some(secs(20)))
        );
    }
    let own = ("SEARCH_HTTP_CLIENT_READ_TIMEOUT", "9s");
    let config = search().env_from([own, both[0]]).finish().unwrap();
    assert_eq!(config.timeout.head, Some(secs(9)), "of this service only");
}

#[test]
fn name_of_another_client_without_a_setting_is_an_error_that_names_the_replacement() {
    let error = |env: (&str, &str)| search().env_from([env]).finish().unwrap_err().to_string();
    let name = "HTTP_CLIENT_MAX_KEEPALIVE_CONNECTIONS";
    assert_eq!(
        error((name, "20")),
        format!(
            "unknown setting `max_keepalive_connections`: use `connect_max_idle`, the maximum idle time of a connection (env {name})"
        )
    );
    for value in ["many", "-1", "4294967296", ""] {
        let error = error(("HTTP_CLIENT_MAX_RETRIES", value));
        assert!(error.starts_with("`retry_attempts` is "), "{error}");
        assert!(error.ends_with("(env HTTP_CLIENT_MAX_RETRIES)"), "{error}");
    }
    let factor = search().env_from([("HTTP_CLIENT_RETRY_BACKOFF_MULTIPLIER", "0.5")]).finish();
    let error = factor.unwrap().check().unwrap_err().to_string();
    assert!(error.starts_with("`retry_backoff_factor` is 0.5: "), "{error}");
    // A file has the names of the settings only.
    for (name, settings) in [
        ("max_connections", "`connect_max_total`"),
        ("read_timeout", "`timeout_head`, `timeout_first_frame`, `timeout_response_idle`"),
        ("max_retries", "`retry_attempts`, the number of retries plus one"),
    ] {
        let error = search().toml(&format!("{name} = 3")).finish().unwrap_err().to_string();
        assert_eq!(error, format!("unknown setting `{name}`: use {settings} (file TOML)"));
    }
    assert!(ServerConfig::load("").env_from([("HTTP_SERVER_MAX_RETRIES", "3")]).finish().is_err());
}
