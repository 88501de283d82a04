package server

import (
	"encoding/json"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"tercet.dev/tercet/server/auth"
	"tercet.dev/tercet/server/wire"
)

var noLimits auth.Limits

func mustURL(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// spec is the part of an OpenAPI document that is compared with the program.
type spec struct {
	Paths      map[string]map[string]any `yaml:"paths"`
	Components struct {
		Parameters map[string]struct {
			Name, In string
		}
		Schemas map[string]schema
	}
}

type schema struct {
	Required   []string
	Properties map[string]any
}

func loadSpec(t *testing.T, extensions ...Extension) spec {
	t.Helper()
	o, err := assembleOpenAPI(extensions)
	if err != nil {
		t.Fatal(err)
	}
	var s spec
	if err := yaml.Unmarshal(o.yaml, &s); err != nil {
		t.Fatal(err)
	}
	var again map[string]any
	if err := json.Unmarshal(o.json, &again); err != nil {
		t.Fatal(err)
	}
	refs(t, again, again, "#")
	return s
}

// refs checks that every reference of the document leads somewhere.
func refs(t *testing.T, root, at any, path string) {
	switch at := at.(type) {
	case map[string]any:
		if ref, ok := at["$ref"].(string); ok {
			target := root
			for _, name := range strings.Split(strings.TrimPrefix(ref, "#/"), "/") {
				m, _ := target.(map[string]any)
				target = m[name]
			}
			if target == nil {
				t.Errorf("%s refers to %s, which is not there", path, ref)
			}
		}
		for name, v := range at {
			refs(t, root, v, path+"/"+name)
		}
	case []any:
		for _, v := range at {
			refs(t, root, v, path)
		}
	}
}

var httpMethods = []string{"get", "put", "post", "delete", "patch"}

// TestOpenAPIRoutes compares the document with the routes, both ways.
func TestOpenAPIRoutes(t *testing.T) {
	s, err := New(Options{Backend: &fakeBackend{}})
	if err != nil {
		t.Fatal(err)
	}
	doc := loadSpec(t)
	ids := map[string]string{}
	for _, p := range s.paths {
		for method := range p.methods {
			if method == http.MethodHead {
				continue
			}
			if doc.Paths[p.pattern][strings.ToLower(method)] == nil {
				t.Errorf("openapi.yaml does not have %s %s", method, p.pattern)
			}
		}
	}
	for pattern, item := range doc.Paths {
		for key, operation := range item {
			if !slices.Contains(httpMethods, key) {
				continue
			}
			method := strings.ToUpper(key)
			path := strings.NewReplacer("{topic}", "t", "{group}", "g", "{id}", "i", "{name}", "n", "{messageId}", "m", "{receiptHandle}", "r").Replace(pattern)
			x := &exchange{s: s, r: &http.Request{Method: method}}
			x.r.URL = mustURL(t, path)
			if handle, _, e := x.route(); e != nil || handle == nil {
				t.Errorf("openapi.yaml has %s %s, which no route answers: %v", method, pattern, e)
			}
			o := operation.(map[string]any)
			id, _ := o["operationId"].(string)
			if id == "" || ids[id] != "" {
				t.Errorf("%s %s: operationId %q is missing, or that of %s", method, pattern, id, ids[id])
			}
			ids[id] = method + " " + pattern
			if o["summary"] == nil || o["tags"] == nil || o["responses"] == nil {
				t.Errorf("%s %s has no summary, tags or responses", method, pattern)
			}
			// Each variable of the path is described.
			parameters := fmtParameters(doc, item["parameters"]) + fmtParameters(doc, o["parameters"])
			for _, segment := range strings.Split(pattern, "/") {
				if variable(segment) && !strings.Contains(parameters, " "+segment) {
					t.Errorf("%s %s does not describe %s", method, pattern, segment)
				}
			}
		}
	}
	if len(ids) < 12 {
		t.Errorf("the document has only %d operations", len(ids))
	}
}

// fmtParameters lists the path parameters of a list, each as " {name}".
func fmtParameters(doc spec, list any) (out string) {
	items, _ := list.([]any)
	for _, item := range items {
		m := item.(map[string]any)
		name, in := m["name"], m["in"]
		if ref, ok := m["$ref"].(string); ok {
			p := doc.Components.Parameters[strings.TrimPrefix(ref, "#/components/parameters/")]
			name, in = p.Name, p.In
		}
		if in == "path" {
			out += " {" + name.(string) + "}"
		}
	}
	return out
}

// wireDocuments are the documents of the wire package that the OpenAPI document describes, by the name of the schema.
var wireDocuments = []any{
	wire.Error{}, wire.Node{}, wire.Cluster{}, wire.ClusterNode{}, wire.Member{}, wire.Advance{}, wire.Topics{}, wire.Topic{}, wire.Groups{}, wire.Group{},
	wire.Messages{}, wire.BrowsedMessage{}, wire.TopicSettings{}, wire.GroupSettings{}, wire.GroupRates{}, wire.Start{}, wire.NewGroup{}, wire.Parked{},
	wire.ParkedMessage{}, wire.ParkedChange{}, wire.ParkedChanged{}, wire.Move{}, wire.Story{}, wire.GroupStory{}, wire.ZoneCopy{}, wire.Tokens{}, wire.Token{}, wire.TokenLimits{}, wire.NewToken{}, wire.CreatedToken{},
}

// TestOpenAPISchemas compares the schemas with the Go types: the same members, of the same kind, required where they
// are always there.
func TestOpenAPISchemas(t *testing.T) {
	doc := loadSpec(t)
	seen := map[string]bool{"Role": true, "Scopes": true}
	for _, d := range wireDocuments {
		typ := reflect.TypeOf(d)
		seen[typ.Name()] = true
		compareSchema(t, doc.Components.Schemas[typ.Name()], typ)
	}
	// What is changed may be left out, so the same members are all optional there.
	for change, whole := range map[string]string{"TopicChange": "TopicSettings", "GroupChange": "GroupSettings"} {
		seen[change] = true
		if a, b := doc.Components.Schemas[change], doc.Components.Schemas[whole]; len(a.Required) > 0 || !reflect.DeepEqual(a.Properties, b.Properties) {
			t.Errorf("the schema %s is not %s with everything optional", change, whole)
		}
	}
	for name := range doc.Components.Schemas {
		if !seen[name] {
			t.Errorf("the schema %s is compared with no type", name)
		}
	}
}

func compareSchema(t *testing.T, s schema, typ reflect.Type) {
	t.Helper()
	var names []string
	for _, f := range reflect.VisibleFields(typ) {
		tag, ok := f.Tag.Lookup("json")
		if f.Anonymous {
			continue // its fields are visible themselves
		}
		if !ok {
			t.Errorf("%s.%s has no json tag", typ.Name(), f.Name)
			continue
		}
		name, options, _ := strings.Cut(tag, ",")
		names = append(names, name)
		property, _ := s.Properties[name].(map[string]any)
		if property == nil {
			t.Errorf("schema %s does not have %s", typ.Name(), name)
			continue
		}
		if optional := strings.Contains(options, "omit"); optional == slices.Contains(s.Required, name) {
			t.Errorf("schema %s: %s is required: %v, and in the program: %v", typ.Name(), name, optional, !optional)
		}
		if want := schemaType(f.Type); property["type"] != nil && property["type"] != want {
			t.Errorf("schema %s: %s is of type %v, and in the program %s", typ.Name(), name, property["type"], want)
		}
	}
	for name := range s.Properties {
		if !slices.Contains(names, name) {
			t.Errorf("schema %s has %s, which the program does not have", typ.Name(), name)
		}
	}
}

func schemaType(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Pointer:
		return schemaType(t.Elem())
	case reflect.Bool:
		return "boolean"
	case reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint32, reflect.Uint64:
		return "integer"
	case reflect.Float64:
		return "number"
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return "string"
		}
		return "array"
	case reflect.Map, reflect.Struct:
		if t.PkgPath() == "time" {
			return "string"
		}
		return "object"
	}
	return "string"
}

// TestExtension runs a route of another part of the node through the server.
func TestExtension(t *testing.T) {
	type thing struct {
		Topic string `json:"topic"`
	}
	e := Extension{
		Routes: []Route{
			{Method: "POST", Pattern: "/v1/things", Access: Admin, Scoped: true, Handle: func(c *Call) (int, any, error) {
				var in thing
				if err := c.Decode(&in); err != nil {
					return 0, nil, err
				}
				if err := c.Allows(Admin, in.Topic); err != nil {
					return 0, nil, err
				}
				return 201, in, nil
			}},
			{Method: "DELETE", Pattern: "/v1/things/{id}", Access: Admin, Handle: func(c *Call) (int, any, error) {
				if c.Param("id") != "a/b" {
					t.Errorf("id %q", c.Param("id"))
				}
				return 204, nil, nil
			}},
		},
		OpenAPI: []byte("paths: {/v1/things: {post: {summary: Makes a thing.}}}\ncomponents: {schemas: {Thing: {type: object}}}"),
	}
	a := authenticator(t, map[string]string{"all": "admin", "one": "admin:order-*"}, noLimits)
	_, base := start(t, Options{Backend: &fakeBackend{}, Authorizer: a, Extensions: []Extension{e}})
	all, one := []string{"Authorization", "Bearer all-secret"}, []string{"Authorization", "Bearer one-secret"}
	r := call(t, "POST", base+"/v1/things", []byte(`{"topic":"order-*"}`), one...)
	expect(t, r, 201, "")
	if string(r.body) != `{"topic":"order-*"}`+"\n" {
		t.Errorf("answered %s", r.body)
	}
	expect(t, call(t, "POST", base+"/v1/things", []byte(`{"topic":"ord*"}`), one...), 403, "forbidden")
	expect(t, call(t, "POST", base+"/v1/things", []byte(`{"topic":"x","y":1}`), all...), 400, "invalid_body")
	expect(t, call(t, "POST", base+"/v1/things", []byte(`{"topic":"x"}`)), 401, "unauthorized")
	expect(t, call(t, "DELETE", base+"/v1/things/a%2Fb", nil, all...), 204, "")
	expect(t, call(t, "DELETE", base+"/v1/things/a%2Fb", nil, one...), 403, "forbidden")
	expect(t, call(t, "GET", base+"/v1/things", nil, all...), 405, "method_not_allowed")
	doc := loadSpec(t, e)
	if doc.Paths["/v1/things"]["post"] == nil || doc.Paths["/v1/node"]["get"] == nil {
		t.Error("the document lacks paths")
	}
	if _, ok := doc.Components.Schemas["Thing"]; !ok {
		t.Error("the document lacks the extension's schema")
	}
	for _, bad := range []Route{{Method: "GET", Pattern: "/v1/node"}, {Method: "GET", Pattern: "/v1/{id}"}, {Method: "GET", Pattern: "/v2/x"}} {
		if _, err := New(Options{Backend: &fakeBackend{}, Extensions: []Extension{{Routes: []Route{bad}}}}); err == nil {
			t.Errorf("the route %s %s was taken", bad.Method, bad.Pattern)
		}
	}
}
