//! What routes do to requests and answers: header changes, redirects, rewrites, copies, CORS, and filters that nobody knows.

use crate::site::{Case, Site, case_addr};
use std::time::Duration;

/// An HTTPRoute on SVC.
macro_rules! http {
    ($rules:literal) => {
        concat!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: SVC, namespace: shop}\n",
            "spec: {parentRefs: [{group: '', kind: Service, name: SVC}], rules: [",
            $rules,
            "]}\n"
        )
    };
}

const HEADERS: &[Case] = &[
    Case {
        what: "set replaces, add appends, remove deletes, on the way there",
        routes: http!(
            "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-Set, value: new}], add: [{name: X-Add, value: more}], remove: [x-gone, x-never]}}], backendRefs: [{name: one, port: 80}]}"
        ),
        asks: &[
            ("GET /headers", &["one GET /headers", "x-set: new", "x-add: more"]),
            (
                "GET /headers | x-set: a | x-set: b | x-add: first | x-gone: 1 | x-other: 2",
                &["x-set: new", "!x-set: a", "!x-set: b", "x-add: first", "x-add: more", "!x-gone", "x-other: 2"],
            ),
            ("h2 GET /headers | x-gone: 1", &["x-set: new", "!x-gone"]),
        ],
    },
    Case {
        what: "and on the way back; the backend's own filters come as well",
        routes: http!(
            "{filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: X-App, value: hidden}], add: [{name: x-rule, value: r}], remove: [x-version]}}], backendRefs: [{name: two, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-backend, value: b}]}}, {type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x-of-two, value: t}]}}]}]}"
        ),
        asks: &[
            (
                "GET /headers",
                &["two GET /headers", "x-backend: b", "x-app: hidden", "x-rule: r", "x-of-two: t", "!x-version"],
            ),
            ("h2 GET /status/404", &["404", "x-rule: r", "x-of-two: t", "!x-version"]),
        ],
    },
    Case {
        what: "a GRPCRoute changes metadata",
        routes: "apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: SVC, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: SVC}], rules: [{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-test, value: set}]}}, {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-answer, value: a}]}}], backendRefs: [{name: one, port: 80}]}]}
",
        asks: &[("grpc POST /a.B/C | x-test: sent", &["x-seen-test: set", "x-answer: a", "grpc-status: 0"])],
    },
    Case {
        what: "a filter that is not known, on a rule or on a backend, is an error and not skipped",
        routes: http!(
            "{matches: [{path: {value: /rule}}], filters: [{type: ExtensionRef, extensionRef: {group: example.com, kind: Magic, name: m}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /auth}}], filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: one, port: 80}}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /backend}}], backendRefs: [{name: one, port: 80, filters: [{type: Magic}]}]},
  {backendRefs: [{name: one, port: 80}]}"
        ),
        asks: &[
            ("GET /rule", &["500"]),
            ("GET /auth", &["500"]),
            ("GET /backend", &["500"]),
            ("grpc POST /backend/x", &["200", "grpc-status: 14"]),
            ("grpc POST /rule/x", &["200", "grpc-status: 13"]),
            ("GET /", &["one GET /"]),
        ],
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn headers_are_changed_and_unknown_filters_are_errors() {
    Site::check("filters-headers", HEADERS).await;
}

const REDIRECTS: &[Case] = &[
    Case {
        what: "statuses",
        routes: http!(
            "{matches: [{path: {value: /default}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: new.test}}]},
  {matches: [{path: {value: /301}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: new.test, statusCode: 301}}]},
  {matches: [{path: {value: /303}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: new.test, statusCode: 303}}]},
  {matches: [{path: {value: /307}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: new.test, statusCode: 307}}]},
  {matches: [{path: {value: /308}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: new.test, statusCode: 308}}]}"
        ),
        asks: &[
            ("GET /default/x?q=1", &["302", "location: http://new.test/default/x?q=1"]),
            ("POST /301", &["301", "location: http://new.test/301"]),
            ("GET /303", &["303", "location: http://new.test/303"]),
            ("h2 GET /307", &["307", "location: http://new.test/307"]),
            ("GET /308", &["308", "location: http://new.test/308"]),
            ("grpc POST /308/x", &["200", "grpc-status: 5", "!location"]),
        ],
    },
    Case {
        what: "scheme and port",
        routes: http!(
            "{matches: [{path: {value: /https}}], filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]},
  {matches: [{path: {value: /both}}], filters: [{type: RequestRedirect, requestRedirect: {scheme: https, port: 8443}}]},
  {matches: [{path: {value: /port}}], filters: [{type: RequestRedirect, requestRedirect: {port: 8080}}]},
  {matches: [{path: {value: /well-known}}], filters: [{type: RequestRedirect, requestRedirect: {scheme: https, port: 443}}]},
  {matches: [{path: {value: /80}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: new.test, port: 80}}]}"
        ),
        asks: &[
            ("GET /https?x | host: a.test:80", &["302", "location: https://a.test/https?x"]),
            ("GET /both | host: a.test", &["location: https://a.test:8443/both"]),
            ("GET /port | host: a.test", &["location: http://a.test:8080/port"]),
            ("GET /well-known | host: a.test", &["location: https://a.test/well-known"]),
            ("GET /80 | host: a.test", &["location: http://new.test/80"]),
        ],
    },
    Case {
        what: "paths",
        routes: http!(
            "{matches: [{path: {value: /full}}], filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: /all/of/it}}}]},
  {matches: [{path: {value: /foo}}], filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /xyz}}}]},
  {matches: [{path: {value: /drop/}}], filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]}"
        ),
        asks: &[
            ("GET /full/x?q=1", &["302", "location: http://web.shop/all/of/it?q=1"]),
            ("GET /foo", &["location: http://web.shop/xyz"]),
            ("GET /foo/", &["location: http://web.shop/xyz/"]),
            ("GET /foo/bar?q", &["location: http://web.shop/xyz/bar?q"]),
            ("GET /drop/bar", &["location: http://web.shop/bar"]),
            ("GET /drop", &["location: http://web.shop/"]),
        ],
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn redirects_of_every_part_with_every_status() {
    let Some(site) = Site::check("filters-redirects", REDIRECTS).await else { return };
    // Without a port in the filter it is the one that the client addressed.
    let mut wrong = String::new();
    let to = "location: http://new.test:90/default";
    site.compare(case_addr(0, 90), "port", "GET /default", &["302", to], &mut wrong).await;
    assert!(wrong.is_empty(), "{wrong}");
}

const REWRITES: &[Case] = &[
    Case {
        what: "the host",
        routes: http!(
            "{filters: [{type: URLRewrite, urlRewrite: {hostname: new.test}}], backendRefs: [{name: one, port: 80}]}"
        ),
        asks: &[
            ("GET /headers?a=b", &["one GET /headers", "query: a=b", "host: new.test"]),
            ("h2 GET /headers | host: old.test", &["one GET /headers", "authority: new.test"]),
        ],
    },
    Case {
        what: "the path",
        routes: http!(
            "{matches: [{path: {value: /full}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /headers/all}}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /foo/}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /headers/}}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /drop}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: ''}}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /backend}}], backendRefs: [{name: two, port: 80, filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /of-two}}}]}]}"
        ),
        asks: &[
            ("GET /full/x?q=1", &["one GET /headers/all", "query: q=1", "host: web.shop"]),
            ("GET /foo", &["one GET /headers"]),
            ("GET /foo/", &["one GET /headers/"]),
            ("GET /foo/bar?q", &["one GET /headers/bar", "query: q"]),
            ("GET /drop/bar", &["one GET /bar"]),
            ("GET /drop", &["one GET /"]),
            ("GET /drop/", &["one GET /"]),
            ("GET /backend/x", &["two GET /of-two/x"]),
        ],
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn rewrites_of_host_and_path() {
    Site::check("filters-rewrites", REWRITES).await;
}

const CORS: &[Case] = &[
    Case {
        what: "named origins",
        routes: http!(
            "{filters: [{type: CORS, cors: {allowOrigins: ['https://app.test', 'https://*.sub.test', 'http://*:81'], allowMethods: [GET, PUT], allowHeaders: [x-a, x-b], exposeHeaders: [x-app], allowCredentials: true, maxAge: 60}}], backendRefs: [{name: one, port: 80}]}"
        ),
        asks: &[
            (
                "OPTIONS /x | origin: https://app.test | access-control-request-method: PUT",
                &[
                    "204",
                    "access-control-allow-origin: https://app.test",
                    "access-control-allow-methods: GET, PUT",
                    "access-control-allow-headers: x-a, x-b",
                    "access-control-expose-headers: x-app",
                    "access-control-allow-credentials: true",
                    "access-control-max-age: 60",
                    "!x-app",
                ],
            ),
            (
                "OPTIONS /x | origin: https://a.b.sub.test | access-control-request-method: GET",
                &["204", "access-control-allow-origin: https://a.b.sub.test"],
            ),
            ("OPTIONS /x | origin: https://sub.test | access-control-request-method: GET", &["204", "!access-control"]),
            (
                "OPTIONS /x | origin: http://any.test:81 | access-control-request-method: GET",
                &["access-control-allow-origin: http://any.test:81"],
            ),
            (
                "h2 OPTIONS /x | origin: https://evil.test | access-control-request-method: GET",
                &["204", "!access-control"],
            ),
            ("OPTIONS /x", &["200", "one OPTIONS /x", "!access-control"]),
            (
                "GET /x | origin: https://app.test",
                &[
                    "one GET /x",
                    "access-control-allow-origin: https://app.test",
                    "access-control-allow-credentials: true",
                    "access-control-expose-headers: x-app",
                    "!access-control-allow-methods",
                ],
            ),
            ("GET /x | origin: https://evil.test", &["200", "one GET /x", "!access-control"]),
            ("GET /x", &["one GET /x", "!access-control"]),
        ],
    },
    Case {
        what: "any origin",
        routes: http!(
            "{filters: [{type: CORS, cors: {allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*']}}], backendRefs: [{name: one, port: 80}]}"
        ),
        asks: &[
            (
                "OPTIONS / | origin: https://a.test | access-control-request-method: PUT | access-control-request-headers: x-c",
                &[
                    "204",
                    "access-control-allow-origin: *",
                    "access-control-allow-methods: *",
                    "access-control-allow-headers: *",
                    "access-control-max-age: 5",
                    "!access-control-allow-credentials",
                ],
            ),
            ("GET / | origin: https://a.test", &["access-control-allow-origin: *", "!access-control-allow-cred"]),
        ],
    },
    Case {
        what: "any origin with credentials",
        routes: http!(
            "{filters: [{type: CORS, cors: {allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*'], allowCredentials: true}}], backendRefs: [{name: one, port: 80}]}"
        ),
        asks: &[
            (
                "OPTIONS / | origin: https://a.test | access-control-request-method: PUT | access-control-request-headers: x-c",
                &[
                    "access-control-allow-origin: https://a.test",
                    "access-control-allow-methods: PUT",
                    "access-control-allow-headers: x-c",
                    "access-control-allow-credentials: true",
                ],
            ),
            (
                "OPTIONS / | origin: https://a.test | access-control-request-method: PUT",
                &["access-control-allow-methods: PUT", "!access-control-allow-headers"],
            ),
        ],
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn cors_answers_preflights_and_marks_answers() {
    Site::check("filters-cors", CORS).await;
}

const MIRRORS: &[Case] = &[
    Case {
        what: "every request, as it was before the rewrite",
        routes: http!(
            "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-test, value: '1'}]}}, {type: RequestMirror, requestMirror: {backendRef: {name: two, port: 80}}}, {type: RequestMirror, requestMirror: {backendRef: {name: gone, port: 80}}}, {type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /rewritten}}}], backendRefs: [{name: one, port: 80}]}"
        ),
        asks: &[("GET /every/1?q", &["200", "one GET /rewritten"]), ("h2 GET /every/2", &["200", "one GET /rewritten"])],
    },
    Case {
        what: "some of them",
        routes: http!(
            "{matches: [{path: {value: /half}}], filters: [{type: RequestMirror, requestMirror: {backendRef: {name: two, port: 80}, percent: 50}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /none}}], filters: [{type: RequestMirror, requestMirror: {backendRef: {name: two, port: 80}, percent: 0}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /third}}], filters: [{type: RequestMirror, requestMirror: {backendRef: {name: two, port: 80}, fraction: {numerator: 1, denominator: 3}}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /slow}}], filters: [{type: RequestMirror, requestMirror: {backendRef: {name: two, port: 80}}}], backendRefs: [{name: one, port: 80, filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /}}}]}]}"
        ),
        asks: &[("GET /none", &["one GET /none"])],
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_get_their_share_and_delay_nobody() {
    let Some(site) = Site::check("filters-mirrors", MIRRORS).await else { return };
    let copies = |start: &str| site.http[1].seen().iter().filter(|l| l.contains(start)).count();
    site.world.eventually("both are copied", async || copies("/every/") == 2).await;
    assert!(site.http[1].seen().iter().any(|l| l.ends_with("/every/1?q")), "{:?}", site.http[1].seen());
    let started = std::time::Instant::now();
    for _ in 0..60 {
        for path in ["half", "third", "none"] {
            assert!(site.ask(case_addr(1, 80), &format!("GET /{path}")).await.contains(&"200".to_string()));
        }
    }
    // The copy's answer takes ten seconds, and nobody waits for it.
    assert!(site.ask(case_addr(1, 80), "GET /slow/sleep/10000").await.contains(&"one GET /".to_string()));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    site.world.eventually("the copies are there", async || copies("/half") > 5 && copies("/third") > 2).await;
    // 30 and 20 expected; six standard deviations are 23 and 22.
    let (half, third, none) = (copies("/half"), copies("/third"), copies("/none"));
    assert!((7..=53).contains(&half) && (1..=42).contains(&third) && none == 0, "{half}, {third}, {none}");
}
