package gateway

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/valkey-io/valkey-go"
)

// IAM makes ElastiCache passwords out of AWS credentials: each is a SigV4-presigned URL without its scheme, good for
// logging in during 15 minutes. The service closes a connection after 12 hours unless it logs in anew, so live
// connections do that well before. Source: ElastiCache user guide, "Authenticating with IAM". Safe for concurrent use.
type IAM struct {
	// Cache is the replication group's id or the serverless cache's name, not its endpoint.
	Cache string
	// User is the ElastiCache user, whose name equals its id.
	User string
	// Region is the cache's AWS region.
	Region string
	// Serverless adds what the service asks of tokens for serverless caches.
	Serverless bool
	// Credentials is where the AWS credentials come from.
	Credentials aws.CredentialsProvider
	// Now is the clock; nil is time.Now.
	Now func() time.Time

	relogin time.Duration // in tests; 0 is iamRelogin
}

// Times of the service.
const (
	iamTokenLife = 15 * time.Minute
	iamRelogin   = 10 * time.Hour // the limit is 12
	emptySHA256  = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

// NewIAM finds AWS credentials as every AWS program does: environment, shared files, container, instance, web identity.
func NewIAM(ctx context.Context, cache, user, region string, serverless bool) (*IAM, error) {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(region))
	if err != nil {
		return nil, fmt.Errorf("AWS configuration: %w", err)
	}
	if cfg.Region == "" {
		return nil, fmt.Errorf("no AWS region: set --iam-region or AWS_REGION")
	}
	return &IAM{Cache: cache, User: user, Region: cfg.Region, Serverless: serverless, Credentials: cfg.Credentials}, nil
}

func (i *IAM) now() time.Time {
	if i.Now != nil {
		return i.Now()
	}
	return time.Now()
}

// Token returns a password that logs in during the next 15 minutes.
func (i *IAM) Token(ctx context.Context) (string, error) {
	creds, err := i.Credentials.Retrieve(ctx)
	if err != nil {
		return "", fmt.Errorf("AWS credentials: %w; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give this machine, task or pod a role", err)
	}
	query := url.Values{"Action": {"connect"}, "User": {i.User}, "X-Amz-Expires": {fmt.Sprint(int(iamTokenLife / time.Second))}}
	if i.Serverless {
		query.Set("ResourceType", "ServerlessCache")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+strings.ToLower(i.Cache)+"/?"+query.Encode(), nil)
	if err != nil {
		return "", err
	}
	signed, _, err := v4.NewSigner().PresignHTTP(ctx, creds, req, emptySHA256, "elasticache", i.Region, i.now().UTC())
	if err != nil {
		return "", fmt.Errorf("cannot sign: %w", err)
	}
	return strings.TrimPrefix(signed, "http://"), nil
}

// credentials is what the client asks for at each login.
func (i *IAM) credentials(valkey.AuthCredentialsContext) (valkey.AuthCredentials, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	token, err := i.Token(ctx)
	if err != nil {
		return valkey.AuthCredentials{}, err
	}
	relogin := i.relogin
	if relogin == 0 {
		relogin = iamRelogin
	}
	// The token is as old as the clock that signs says; when to log in anew is a matter of this process's time.
	return valkey.AuthCredentials{Username: i.User, Password: token, RefreshAfter: time.Now().Add(relogin)}, nil
}
