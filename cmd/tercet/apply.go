package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/vercel"
	"tercet.dev/tercet/server/wire"
)

// manifest is what `tercet apply` reads.
type manifest struct {
	// Source names the manifest: --prune deletes subscriptions of this source that the manifest does not have.
	Source        string                 `yaml:"source"`
	Subscriptions []manifestSubscription `yaml:"subscriptions"`
	Vercel        []manifestVercel       `yaml:"vercel"`
}

// manifestSubscription is wire.Subscription as it stands in YAML. Secrets stand in files beside it, or in variables.
type manifestSubscription struct {
	Topic               string `yaml:"topic"`
	ConsumerGroup       string `yaml:"consumerGroup"`
	URL                 string `yaml:"url"`
	DeploymentID        string `yaml:"deploymentId"`
	Type                string `yaml:"type"`
	RetryAfterSeconds   *int64 `yaml:"retryAfterSeconds"`
	InitialDelaySeconds *int64 `yaml:"initialDelaySeconds"`
	MaxConcurrency      *int64 `yaml:"maxConcurrency"`
	MaxDeliveries       *int64 `yaml:"maxDeliveries"`
	InlineBytesMax      *int64 `yaml:"inlineBytesMax"`
	LeaseSeconds        *int64 `yaml:"leaseSeconds"`
	TimeoutSeconds      *int64 `yaml:"timeoutSeconds"`
	Paused              bool   `yaml:"paused"`
	Secret              secret `yaml:"secret"`
	BearerToken         secret `yaml:"bearerToken"`
	ClientCertificate   secret `yaml:"clientCertificate"`
	ClientKey           secret `yaml:"clientKey"`
	CACertificate       secret `yaml:"caCertificate"`
}

// secret is a value, or where it stands: {file: PATH} or {env: NAME}.
type secret struct {
	Value string `yaml:"value"`
	File  string `yaml:"file"`
	Env   string `yaml:"env"`
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (s *secret) UnmarshalYAML(node *yaml.Node) error {
	if node.Kind == yaml.ScalarNode {
		return node.Decode(&s.Value)
	}
	type plain secret
	return node.Decode((*plain)(s))
}

// read returns the value. Files are found beside the manifest.
func (s *secret) read(dir string, getenv func(string) (string, bool)) (string, error) {
	switch {
	case s.File != "" && s.Env == "" && s.Value == "":
		content, err := os.ReadFile(relativeTo(dir, s.File))
		return strings.TrimRight(string(content), "\r\n"), err
	case s.Env != "" && s.File == "" && s.Value == "":
		v, ok := getenv(s.Env)
		if !ok {
			return "", fmt.Errorf("the variable %s is not set", s.Env)
		}
		return v, nil
	case s.File != "" || s.Env != "":
		return "", errors.New("give one of a value, file and env")
	}
	return s.Value, nil
}

func relativeTo(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

// manifestVercel is a vercel.json and where its application answers.
type manifestVercel struct {
	File         string `yaml:"file"`
	App          string `yaml:"app"`
	DeploymentID string `yaml:"deploymentId"`
	BearerToken  secret `yaml:"bearerToken"`
	Secret       secret `yaml:"secret"`
}

// readManifest reads and checks a manifest; all problems are reported at once.
func readManifest(file string, in io.Reader, getenv func(string) (string, bool)) (source string, subs []wire.Subscription, err error) {
	dir := "."
	r := in
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", nil, err
		}
		defer f.Close()
		r, dir = f, filepath.Dir(file)
	}
	var m manifest
	dec := yaml.NewDecoder(r)
	dec.KnownFields(true)
	if err := dec.Decode(&m); err != nil && !errors.Is(err, io.EOF) {
		return "", nil, fmt.Errorf("%s: %w", file, err)
	}
	if source = m.Source; source == "" {
		source = "apply"
		if file != "-" {
			source = "apply:" + filepath.Base(file)
		}
	}
	var problems []error
	for i := range m.Subscriptions {
		s := &m.Subscriptions[i]
		w := wire.Subscription{
			Topic: s.Topic, ConsumerGroup: s.ConsumerGroup, URL: s.URL, DeploymentID: s.DeploymentID, Type: s.Type, RetryAfterSeconds: s.RetryAfterSeconds,
			InitialDelaySeconds: s.InitialDelaySeconds, MaxConcurrency: s.MaxConcurrency, MaxDeliveries: s.MaxDeliveries, InlineBytesMax: s.InlineBytesMax,
			LeaseSeconds: s.LeaseSeconds, TimeoutSeconds: s.TimeoutSeconds, Paused: s.Paused, Source: source,
		}
		for _, v := range []struct {
			name string
			from *secret
			to   *string
		}{
			{"secret", &s.Secret, &w.Secret}, {"bearerToken", &s.BearerToken, &w.BearerToken}, {"clientCertificate", &s.ClientCertificate, &w.ClientCertificate},
			{"clientKey", &s.ClientKey, &w.ClientKey}, {"caCertificate", &s.CACertificate, &w.CACertificate},
		} {
			if *v.to, err = v.from.read(dir, getenv); err != nil {
				problems = append(problems, fmt.Errorf("%s: subscription %d: %s: %w", file, i+1, v.name, err))
			}
		}
		subs = append(subs, w)
	}
	for i := range m.Vercel {
		v := &m.Vercel[i]
		if v.File == "" {
			v.File = "vercel.json"
		}
		more, err := readVercel(relativeTo(dir, v.File), v.App, v.DeploymentID, source)
		if err != nil {
			problems = append(problems, err)
		}
		token, err := v.BearerToken.read(dir, getenv)
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: vercel %d: bearerToken: %w", file, i+1, err))
		}
		signing, err := v.Secret.read(dir, getenv)
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: vercel %d: secret: %w", file, i+1, err))
		}
		for j := range more {
			more[j].BearerToken, more[j].Secret = token, signing
		}
		subs = append(subs, more...)
	}
	seen := map[[3]string]bool{}
	for _, s := range subs {
		key := [3]string{s.Topic, s.ConsumerGroup, s.DeploymentID}
		if seen[key] {
			problems = append(problems, fmt.Errorf("%s: topic %q, group %q, deployment %q stand twice", file, s.Topic, s.ConsumerGroup, s.DeploymentID))
		}
		seen[key] = true
	}
	return source, subs, errors.Join(problems...)
}

// readVercel makes subscriptions of a vercel.json's queue triggers.
func readVercel(file, app, deployment, source string) ([]wire.Subscription, error) {
	base, err := url.Parse(app)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" || base.RawQuery != "" || base.Fragment != "" {
		return nil, fmt.Errorf("the application's address %q is no http or https URL", app)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	project := os.DirFS(filepath.Dir(file))
	consumers, err := vercel.Parse(data, project)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var subs []wire.Subscription
	for _, c := range consumers {
		subs = append(subs, wire.Subscription{
			Topic: c.Topic, ConsumerGroup: c.Group, URL: base.JoinPath(c.Route).String(), DeploymentID: deployment, Type: c.Type,
			RetryAfterSeconds: c.RetryAfterSeconds, InitialDelaySeconds: c.InitialDelaySeconds, MaxConcurrency: c.MaxConcurrency,
			MaxDeliveries: c.MaxDeliveries, Source: source,
		})
	}
	return subs, nil
}

// applied is what became of one subscription.
type applied struct {
	Change        string `json:"change"`
	ID            string `json:"id"`
	Topic         string `json:"topic"`
	ConsumerGroup string `json:"consumerGroup"`
	DeploymentID  string `json:"deploymentId,omitempty"`
	URL           string `json:"url,omitempty"`
	// Fields are the settings that differ.
	Fields []string `json:"fields,omitempty"`
	Secret string   `json:"secret,omitempty"`
}

// applySubscriptions makes the cluster's subscriptions fit: those given are created or changed, and with prune those of
// the same source that are not given are deleted. tell is called for each.
func applySubscriptions(ctx context.Context, cl *client.Client, source string, subs []wire.Subscription, prune, dryRun bool, tell func(applied) error) error {
	have, err := cl.Subscriptions(ctx)
	if err != nil {
		return err
	}
	before := make(map[string]wire.Subscription, len(have))
	for _, s := range have {
		before[s.ID] = s
	}
	kept := map[string]bool{}
	if !dryRun {
		// All or none, as far as what is wrong shows before: a mistake in the last one should not leave half of them.
		for _, s := range subs {
			if _, err := cl.CreateSubscription(ctx, s, true); err != nil {
				return fmt.Errorf("topic %q, group %q: %w", s.Topic, s.ConsumerGroup, err)
			}
		}
	}
	for _, s := range subs {
		out, err := cl.CreateSubscription(ctx, s, dryRun)
		if err != nil {
			return fmt.Errorf("topic %q, group %q: %w", s.Topic, s.ConsumerGroup, err)
		}
		kept[out.ID] = true
		line := applied{Change: out.Change, ID: out.ID, Topic: out.Topic, ConsumerGroup: out.ConsumerGroup, DeploymentID: out.DeploymentID, URL: out.URL, Secret: out.Secret}
		if old, ok := before[out.ID]; ok && out.Change == "changed" {
			line.Fields = differences(&old, &out)
		}
		if err := tell(line); err != nil {
			return err
		}
	}
	for _, s := range have {
		if !prune || s.Source != source || kept[s.ID] {
			continue
		}
		if !dryRun {
			if err := cl.DeleteSubscription(ctx, s.ID); err != nil && !isNotFound(err) {
				return err
			}
		}
		if err := tell(applied{Change: "deleted", ID: s.ID, Topic: s.Topic, ConsumerGroup: s.ConsumerGroup, DeploymentID: s.DeploymentID, URL: s.URL}); err != nil {
			return err
		}
	}
	return nil
}

// differences names what differs between two subscriptions, with both values where they are shown at all.
func differences(a, b *wire.Subscription) []string {
	var out []string
	add := func(name, from, to string) {
		if from != to {
			out = append(out, fmt.Sprintf("%s: %s → %s", name, orDash(from), orDash(to)))
		}
	}
	add("url", a.URL, b.URL)
	add("type", a.Type, b.Type)
	add("retryAfterSeconds", bound(a.RetryAfterSeconds), bound(b.RetryAfterSeconds))
	add("initialDelaySeconds", bound(a.InitialDelaySeconds), bound(b.InitialDelaySeconds))
	add("maxConcurrency", bound(a.MaxConcurrency), bound(b.MaxConcurrency))
	add("maxDeliveries", bound(a.MaxDeliveries), bound(b.MaxDeliveries))
	add("inlineBytesMax", bound(a.InlineBytesMax), bound(b.InlineBytesMax))
	add("leaseSeconds", bound(a.LeaseSeconds), bound(b.LeaseSeconds))
	add("timeoutSeconds", bound(a.TimeoutSeconds), bound(b.TimeoutSeconds))
	add("paused", fmt.Sprint(a.Paused), fmt.Sprint(b.Paused))
	add("source", a.Source, b.Source)
	if a.ClientCertificate != b.ClientCertificate {
		out = append(out, "clientCertificate")
	}
	if a.CACertificate != b.CACertificate {
		out = append(out, "caCertificate")
	}
	if len(out) == 0 {
		out = append(out, "a secret")
	}
	return out
}

func (a *app) applyCommand() *cobra.Command {
	var c connection
	var file string
	var prune, dryRun bool
	cmd := &cobra.Command{
		Use:     "apply",
		Short:   "Make the subscriptions fit a file",
		GroupID: groupEveryday,
		Long: `Creates and changes subscriptions so that they are what a YAML file says; doing it again changes nothing.
Nothing is changed if one of them is not valid. With --prune, subscriptions that an earlier version of the same file made
and that it no longer has are deleted. See docs/push.md for the file; it can name a vercel.json as it stands.`,
		Example: examples(`
			tercet apply -f subscriptions.yaml
			tercet apply -f subscriptions.yaml --prune --dry-run
			generate | tercet apply -f -`),
		Args: cobra.NoArgs,
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, _ []string) error {
			source, subs, err := readManifest(file, a.in, a.getenv)
			if err != nil {
				return usageError{err}
			}
			counts := map[string]int{}
			err = applySubscriptions(ctx, cl, source, subs, prune, dryRun, func(s applied) error {
				counts[s.Change]++
				return a.print(s, func(w io.Writer) error { return writeApplied(w, s) })
			})
			if err != nil {
				return err
			}
			verb := ""
			if dryRun {
				verb = "would be "
			}
			a.note("%s%d created, %d changed, %d deleted, %d unchanged", verb, counts["created"], counts["changed"], counts["deleted"], counts["unchanged"])
			return nil
		}),
	}
	c.register(cmd)
	cmd.Flags().StringVarP(&file, "file", "f", "", "YAML `file`, - for stdin (required)")
	cmd.Flags().BoolVar(&prune, "prune", false, "delete subscriptions of the same source that the file does not have")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be done, and do nothing")
	_ = cmd.MarkFlagRequired("file") // there is such a flag
	return cmd
}

// signs stand before the lines of apply.
var signs = map[string]string{"created": "+", "changed": "~", "deleted": "-", "unchanged": "="}

func writeApplied(w io.Writer, s applied) error {
	name := s.Topic + " " + s.ConsumerGroup
	if s.DeploymentID != "" {
		name += " " + s.DeploymentID
	}
	if _, err := fmt.Fprintf(w, "%s %s %s %s\n", signs[s.Change], s.ID, name, s.URL); err != nil {
		return err
	}
	lines := slices.Clone(s.Fields)
	if s.Secret != "" {
		lines = append(lines, "secret "+s.Secret+" (shown only now)")
	}
	for _, l := range lines {
		if _, err := fmt.Fprintf(w, "    %s\n", l); err != nil {
			return err
		}
	}
	return nil
}
