package vercel

import (
	"strings"
	"testing"
	"testing/fstest"
)

func TestGroup(t *testing.T) {
	// The first three are Vercel's own examples, the last follows from charCodeAt.
	for file, want := range map[string]string{
		"api/test.js":                           "api_Stest_Djs",
		"api/users/handler.ts":                  "api_Susers_Shandler_Dts",
		"my_func.ts":                            "my__func_Dts",
		"api/queue_x.ts":                        "api_Squeue__x_Dts",
		"app/api/queues/process-order/route.ts": "app_Sapi_Squeues_Sprocess-order_Sroute_Dts",
		"app/(jobs)/[id]/route.ts":              "app_S_28jobs_29_S_5Bid_5D_Sroute_Dts",
		"web~api/a b.ts":                        "web_7Eapi_Sa_20b_Dts",
		"api/é.ts":                              "api_S_E9_Dts",
		"api/😀.ts":                              "api_S_D83D_Dts",
		"api/\t.ts":                             "api_S_09_Dts",
	} {
		if got := Group(file); got != want {
			t.Errorf("Group(%q) = %q, want %q", file, got, want)
		}
	}
}

func TestRoute(t *testing.T) {
	for file, want := range map[string]string{
		"app/api/queues/process-order/route.ts":     "/api/queues/process-order",
		"src/app/api/queues/process-order/route.ts": "/api/queues/process-order",
		"app/(jobs)/api/(inner)/orders/route.js":    "/api/orders",
		"app/route.ts":                              "/",
		"app/(all)/route.tsx":                       "/",
		"pages/api/orders.ts":                       "/api/orders",
		"src/pages/api/orders.ts":                   "/api/orders",
		"pages/api/orders/index.ts":                 "/api/orders",
		"pages/api/_private.ts":                     "/api/_private",
		"api/orders.ts":                             "/api/orders",
		"api/orders/index.ts":                       "/api/orders",
		"api/orders.py":                             "/api/orders",
		"src/api/orders.go":                         "/api/orders",
		"./api/orders.ts":                           "/api/orders",
		"app/api/%5Fhidden/route.ts":                "/api/_hidden",
		"app/app/route.ts":                          "/app",
	} {
		if got, err := Route(file); err != nil || got != want {
			t.Errorf("Route(%q) = %q, %v, want %q", file, got, err, want)
		}
	}
	for _, file := range []string{
		"", ".", "../api/x.ts", "app/api/orders.ts", "app/api/page.tsx", "pages/orders.ts", "lib/orders.ts", "api", "app/api/[id]/route.ts",
		"app/api/[...all]/route.ts", "pages/api/[[...all]].ts", "app/@modal/route.ts", "app/(.)photo/route.ts", "app/_lib/route.ts", "app/api/route.py",
	} {
		if got, err := Route(file); err == nil {
			t.Errorf("Route(%q) = %q, want an error", file, got)
		}
	}
}

func TestParse(t *testing.T) {
	project := fstest.MapFS{
		"app/api/queues/a/route.ts":              {},
		"app/api/queues/b/route.ts":              {},
		"node_modules/x/app/api/queues/route.ts": {},
		"src/app/api/jobs/c/route.ts":            {},
		"pages/api/old.js":                       {},
	}
	got, err := Parse([]byte("\ufeff"+`{
		"$schema": "https://openapi.vercel.sh/vercel.json", "crons": [{"path": "/x", "schedule": "* * * * *"}],
		"functions": {
			"app/api/queues/a/route.ts": {"maxDuration": 30, "experimentalTriggers": [
				{"type": "queue/v2beta", "topic": "orders", "retryAfterSeconds": 0.5, "initialDelaySeconds": 0, "maxConcurrency": 3, "maxDeliveries": 5},
				{"type": "cron/v1", "schedule": "@daily"}]},
			"app/api/queues/*/route.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "order-*"}]},
			"app/api/{jobs,other}/**/route.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "*"}]},
			"pages/api/old.js": {"experimentalTriggers": [{"type": "queue/v1beta", "topic": "orders", "consumer": "one"}, {"type": "queue/v1beta", "topic": "jobs", "consumer": "two"}]},
			"app/page.tsx": {"memory": 1024}
		}}`), project)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	num := func(v *int64) string {
		if v == nil {
			return "-"
		}
		return string(rune('0' + *v))
	}
	for _, c := range got {
		lines = append(lines, strings.Join([]string{c.Type, c.Topic, c.Group, c.Route, num(c.RetryAfterSeconds), num(c.InitialDelaySeconds), num(c.MaxConcurrency), num(c.MaxDeliveries)}, " "))
	}
	want := `queue/v2beta orders app_Sapi_Squeues_Sa_Sroute_Dts /api/queues/a 1 0 3 5
queue/v2beta order-* app_Sapi_Squeues_Sb_Sroute_Dts /api/queues/b - - - -
queue/v2beta * src_Sapp_Sapi_Sjobs_Sc_Sroute_Dts /api/jobs/c - - - -
queue/v1beta orders one /api/old - - - -
queue/v1beta jobs two /api/old - - - -`
	if text := strings.Join(lines, "\n"); text != want {
		t.Errorf("got\n%s\nwant\n%s", text, want)
	}
}

func TestParseProblems(t *testing.T) {
	for text, want := range map[string]string{
		`[]`:                "not a vercel.json",
		`{"functions": []}`: "functions is not an object",
		`{"functions": {"a.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "t"}]}}}`:                                             "cannot tell which route",
		`{"functions": {"api/a.ts": {"experimentalTriggers": [{"type": "queue/v3", "topic": "t"}]}}}`:                                             "is not known",
		`{"functions": {"api/a.ts": {"experimentalTriggers": [{"type": "queue/v2beta"}]}}}`:                                                       "needs a topic",
		`{"functions": {"api/a.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "a*b"}]}}}`:                                       "one * at the end",
		`{"functions": {"api/a.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "t", "consumer": "c"}]}}}`:                        "consumer belongs to",
		`{"functions": {"api/a.ts": {"experimentalTriggers": [{"type": "queue/v1beta", "topic": "t"}]}}}`:                                         "needs a consumer",
		`{"functions": {"api/a.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "t", "retryAfterSeconds": 0}]}}}`:                 "out of range",
		`{"functions": {"api/a.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "t", "maxConcurrency": 1.5}]}}}`:                  "out of range",
		`{"functions": {"api/a.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "t"}, {"type": "queue/v2beta", "topic": "u"}]}}}`: "has one trigger",
		`{"functions": {"api/*.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "t"}]}}}`:                                         "needs the project's files",
	} {
		if got, err := Parse([]byte(text), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Parse(%s) = %v, %v; want an error with %q", text, got, err, want)
		}
	}
	if _, err := Parse([]byte(`{"functions": {"api/*.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "t"}]}}}`), fstest.MapFS{}); err == nil {
		t.Error("a pattern that matches nothing is no error")
	}
	if got, err := Parse([]byte(`{}`), nil); err != nil || len(got) != 0 {
		t.Errorf("an empty vercel.json: %v, %v", got, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"functions": {"app/**/{a,b}/route.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": "t"}]}}}`))
	project := fstest.MapFS{"app/x/a/route.ts": {}, "app/b/route.ts": {}}
	f.Fuzz(func(t *testing.T, data []byte) {
		cs, err := Parse(data, project)
		if err != nil {
			return
		}
		for _, c := range cs {
			if !strings.HasPrefix(c.Route, "/") || c.Group == "" || c.Topic == "" {
				t.Errorf("%s: %+v", data, c)
			}
		}
	})
}
