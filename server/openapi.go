package server

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"net/http"

	"go.yaml.in/yaml/v3"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// openAPISource is the OpenAPI document of the server's own paths.
//
//go:embed openapi.yaml
var openAPISource []byte

// openAPI is the document in both of its forms.
type openAPI struct{ yaml, json []byte }

// assembleOpenAPI merges what extensions say of their paths into the document.
func assembleOpenAPI(extensions []Extension) (openAPI, error) {
	var document map[string]any
	if err := yaml.Unmarshal(openAPISource, &document); err != nil {
		return openAPI{}, fmt.Errorf("openapi.yaml: %w", err)
	}
	for _, e := range extensions {
		if len(e.OpenAPI) == 0 {
			continue
		}
		var more map[string]any
		if err := yaml.Unmarshal(e.OpenAPI, &more); err != nil {
			return openAPI{}, fmt.Errorf("OpenAPI document of an extension: %w", err)
		}
		if err := merge(document, more, ""); err != nil {
			return openAPI{}, fmt.Errorf("OpenAPI document of an extension: %w", err)
		}
	}
	var o openAPI
	var err error
	if o.yaml, err = yaml.Marshal(document); err != nil {
		return openAPI{}, err
	}
	if o.json, err = json.MarshalIndent(document, "", "  "); err != nil {
		return openAPI{}, err
	}
	return o, nil
}

// merge adds what src has and dst has not. A value that both have must be a mapping in both.
func merge(dst, src map[string]any, at string) error {
	for key, value := range src {
		have, both := dst[key]
		if !both {
			dst[key] = value
			continue
		}
		a, ok1 := have.(map[string]any)
		b, ok2 := value.(map[string]any)
		if !ok1 || !ok2 {
			return fmt.Errorf("%s/%s stands there already", at, key)
		}
		if err := merge(a, b, at+"/"+key); err != nil {
			return err
		}
	}
	return nil
}

// openAPIYAML answers GET /v1/openapi.yaml.
func (x *exchange) openAPIYAML() {
	x.showOpenAPI("application/yaml", func(o openAPI) []byte { return o.yaml })
}

// openAPIJSON answers GET /v1/openapi.json.
func (x *exchange) openAPIJSON() {
	x.showOpenAPI(wire.MediaJSON, func(o openAPI) []byte { return o.json })
}

func (x *exchange) showOpenAPI(media string, form func(openAPI) []byte) {
	o, err := x.s.openAPI()
	if err != nil {
		x.fail(errs.Of(errs.Internal).With(err))
		return
	}
	h := x.w.Header()
	h["Content-Type"] = []string{media}
	h["X-Content-Type-Options"] = noSniff
	h[wire.HeaderRequestID] = []string{x.requestID()}
	x.w.WriteHeader(http.StatusOK)
	if x.r.Method != http.MethodHead {
		x.w.Write(form(o))
	}
}
